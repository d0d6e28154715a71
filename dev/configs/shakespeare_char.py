# nanoGPT's Shakespeare of characters for a CPU: python -m scripts.base_train dev/configs/shakespeare_char.py
# Before it: python -m dev.prepare_shakespeare
# The recipe for CPUs (4 layers of width 128, 2,000 steps of 12 x 64 tokens; 1.88 published), with our model and Muon.
# For a GPU: --depth=6 --aspect-ratio=64 --head-dim=64 --max-seq-len=256 --device-batch-size=64
# --total-batch-size=16384 --num-iterations=5000 --compile --dtype=auto

# Run
compile = False
dtype = "float32"
model_tag = "shakespeare_char"
# Text
corpus = "shakespeare_char"
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
