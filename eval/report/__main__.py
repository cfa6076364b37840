"""`python -m eval.report runs/<run>`."""

from eval.report.command import main

if __name__ == "__main__":
    main()
