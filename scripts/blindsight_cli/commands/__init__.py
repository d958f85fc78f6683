"""One module per command of `blindsight`; `main.py` imports each only when it is called."""
