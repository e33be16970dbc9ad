"""Generate along a slider, by the name that the original gives it."""

from recipes.pairedit.generate import main, parse_args
from recipes.pairedit.options import run_as

if __name__ == "__main__":
    run_as(main, parse_args)
