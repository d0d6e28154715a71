# laptop.py with the faster recipe: python -m scripts.base_train dev/configs/fast.py
# What it adds, and what it was measured to bring: nanochat/fast.py, docs/reference/experiments.md
base = "laptop.py"
arch = "fast"
