"""Files that leave: saved forwards, and models as one program that runs without this package."""
