"""`python -m rgrl COMMAND ...`, also for `accelerate launch -m rgrl COMMAND ...`."""

from rgrl.cli import main

if __name__ == "__main__":
    main()
