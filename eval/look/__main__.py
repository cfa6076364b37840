"""`python -m eval.look ckpt=runs/<run> what=neighbours`."""

import sys

from eval.look.asked import end_early

if __name__ == "__main__":
    end_early(sys.argv[1:])
    from eval.look.command import main  # after what needs no torch

    main()
