# A base model for two CPU cores: python -m scripts.base_train dev/configs/laptop.py
# Why it is as fast as it is: docs/explanation/cpu.md

# Model: 3.3 M parameters with a vocabulary of 4,096, half of them in embedding and head
depth = 4
aspect_ratio = 48  # width 192, 3 heads of 64
max_seq_len = 256
# Horizon
minutes = 3.1  # about 900 steps, 3.7 M tokens, 13 MB of text at 20,000 tokens/s
# Batch
device_batch_size = 16
total_batch_size = 4096  # a small batch: in so little time more steps are worth more than less noise
# Optimizers: the rates of the large runs; half and double the head's, and 1.5 times the matrices', were no better
matrix_lr = 0.02
embedding_lr = 0.2
unembedding_lr = 0.004
warmdown_ratio = 0.5
# Evaluation
eval_every = 250
eval_tokens = 262144  # more than the validation text of the docs corpus has
sample_every = 1000
