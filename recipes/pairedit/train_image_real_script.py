"""Train by config/NAME.yaml: `python -m recipes.pairedit.train_image_real_script --c=train_image_real`."""

from recipes.pairedit.options import run_as
from recipes.pairedit.train import main, parse_args

if __name__ == "__main__":
    run_as(main, parse_args)
