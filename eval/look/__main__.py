"""`python -m eval.look ckpt=runs/<run> what=neighbours`."""

from eval.look.command import main

if __name__ == "__main__":
    main()
