"""Talk to a model, in the terminal or by HTTP."""

from dschat.runtime.log import run_main
from dschat.serving.program import main

if __name__ == "__main__":
    run_main(main)
