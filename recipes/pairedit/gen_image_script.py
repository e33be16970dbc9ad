"""Generate by config/NAME.yaml: `python -m recipes.pairedit.gen_image_script --c=NAME`."""

from recipes.pairedit.generate import main, parse_args
from recipes.pairedit.options import run_as

if __name__ == "__main__":
    run_as(main, parse_args)
