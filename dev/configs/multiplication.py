# Products of digits: python -m scripts.base_train dev/configs/multiplication.py
# Before it: python -m dev.make_arithmetic --task=multiplication --train-share=1
# After it: python -m dev.grokking_curve --model-tag=multiplication
# Two digits, 10,000 lines: --digits=2 before it, then --optimizer=muon --schedule=trapezoid --max-seq-len=10
# --total-batch-size=5120 --device-batch-size=512 --num-iterations=800: 100 % right after 800 steps, 4 minutes of one
# core. With AdamW, as below, 43 % after 2,000 steps: what is learned by heart, Muon learns faster.

# Run
compile = False
dtype = "float32"
model_tag = "multiplication"
# Text
corpus = "multiplication"
# Model
depth = 2
aspect_ratio = 64  # width 128
head_dim = 32
max_seq_len = 6  # BOS 3 * 7 = 2, and what comes after it
# Horizon
num_iterations = 300
# Batch
device_batch_size = 100
total_batch_size = 600  # 100 lines
# Optimizers
optimizer = "adamw"
lr = 1e-3
weight_decay = 0.1
schedule = "constant"
warmup_ratio = 0.03  # ten steps
# Evaluation
eval_every = 10
eval_train = True
sample_every = -1
