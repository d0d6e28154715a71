"""One runnable module per stage: python -m scripts.<stage> --help."""
