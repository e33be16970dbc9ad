"""Edit real images by config/NAME.yaml: `... gen_real_image_script --c=train_image_real`."""

from recipes.pairedit.generate_real_image import main, parse_args
from recipes.pairedit.options import run_as

if __name__ == "__main__":
    run_as(main, parse_args)
