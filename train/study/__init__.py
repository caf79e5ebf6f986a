"""Models trained alike and compared: `python -m train.study`, the command in `__main__`."""
