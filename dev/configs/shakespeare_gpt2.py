# Shakespeare in tokens of GPT-2 for a CPU: python -m scripts.base_train dev/configs/shakespeare_gpt2.py
# Before it: python -m dev.prepare_shakespeare --kind=gpt2
# The other settings are those of shakespeare_char.py.

# Run
compile = False
dtype = "float32"
model_tag = "shakespeare_gpt2"
# Text
corpus = "shakespeare"
packing = "flat"  # one long stream: there is one document
# Model
depth = 4
aspect_ratio = 32  # width 128
head_dim = 32
max_seq_len = 64
# Horizon
num_iterations = 2000
# Batch
device_batch_size = 12
total_batch_size = 768
# Evaluation
eval_every = 500
sample_every = -1
