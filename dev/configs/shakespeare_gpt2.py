base = "shakespeare_char.py"
# Shakespeare in tokens of GPT-2 for a CPU: python -m scripts.base_train dev/configs/shakespeare_gpt2.py
# Before it: python -m dev.prepare_shakespeare --kind=gpt2

# Run
model_tag = "shakespeare_gpt2"
# Text
corpus = "shakespeare"
