"""PairEdit's full method: `train` with --python_name train_image, whatever the config says."""

from recipes.pairedit.options import run_as
from recipes.pairedit.train import main, parse_args

if __name__ == "__main__":
    run_as(main, parse_args, ["--python_name", "train_image"])
