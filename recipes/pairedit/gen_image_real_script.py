"""Edit real images by config/NAME.yaml, by its second name."""

from recipes.pairedit.generate_real_image import main, parse_args
from recipes.pairedit.options import run_as

if __name__ == "__main__":
    run_as(main, parse_args)
