"""A page to try a backbone: drop an image and see what it makes of it; `python -m eval.app ckpt=runs/<run>`."""
