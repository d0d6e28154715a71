# The laptop's base model: python -m scripts.base_train dev/configs/fast.py
# laptop.py with the faster recipe; what it adds and what that brings: nanochat/fast.py, docs/reference/experiments.md
base = "laptop.py"
arch = "fast"
aspect_ratio = 32  # width 128: in two minutes 1.543 bits per byte where 192 comes to 1.586, 1.6 times as many steps
