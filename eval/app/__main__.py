"""`python -m eval.app ckpt=runs/<run>`."""

from eval.app.command import main

if __name__ == "__main__":
    main()
