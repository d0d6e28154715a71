# Grokking, x/y modulo 53: python -m scripts.base_train dev/configs/grokking.py
# Before it: python -m dev.make_arithmetic --p=53 --train-share=0.5
# After it: python -m dev.grokking_curve --model-tag=grokking

# Run
compile = False
dtype = "float32"
model_tag = "grokking"
# Text
corpus = "grokking"
# Model
arch = "gpt2"
depth = 1  # the paper (arXiv 2201.02177) has two layers of this width
aspect_ratio = 128  # width 128, 4 heads
head_dim = 32
max_seq_len = 5  # BOS x o y =
# Horizon
num_iterations = 2450
# Batch
device_batch_size = 256
total_batch_size = 1280  # 256 lines
# Optimizers
optimizer = "adamw"
lr = 1e-3
beta2 = 0.98
weight_decay = 1.0  # the help to generalising that the paper found to be the best
schedule = "constant"
warmup_ratio = 0.01  # 24 steps
# Evaluation
eval_every = 50
eval_train = True
sample_every = -1
