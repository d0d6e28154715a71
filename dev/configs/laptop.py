# A model for two CPU cores: four layers, 192 wide, about eight minutes of training. Measured choices, see
# docs/explanation/cpu.md. python -m scripts.base_train dev/configs/laptop.py

# Model: 3.3 M parameters with a vocabulary of 4,096, half of them in embedding and head
depth = 4
aspect_ratio = 48  # width 192, 3 heads of 64
max_seq_len = 256
# Horizon
minutes = 6.0
# Batch: 4,096 tokens, small enough for 1,500 steps in the time
device_batch_size = 16
total_batch_size = 4096
# Optimizers: at this batch the rates of the large runs are right
matrix_lr = 0.02
embedding_lr = 0.2
unembedding_lr = 0.004
warmdown_ratio = 0.5
# Evaluation: 64 K tokens take a second
eval_every = 250
eval_tokens = 262144
sample_every = 1000
