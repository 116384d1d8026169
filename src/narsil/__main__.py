"""``python -m narsil``."""

from narsil.cli import main

if __name__ == "__main__":
    main()
