# Horizon, batch, rates and decay of karpathy/nanochat (92d63d4, its scripts/base_train.py), in our settings:
#
#   VOCAB_SIZE=32768 BASE_ARGS=dev/configs/speedrun_2026.py bash speedrun.sh
#
# Not run on a GPU yet: parsed, and run for six steps of a d2 on a CPU. The vocabulary of 32,768 is the tokenizer's:
# python -m scripts.tok_train --corpus=climbmix --max-chars=2000000000 --vocab-size=32768
#
# nanochat's numbers are of a d12: N = 110.1 M parameters in matmuls, D = 12 N tokens, batches of B = 2^19. It moves B
# by (D / D of d12)^0.383, to the nearest power of two; all rates by sqrt(B / 2^19); decay by sqrt(B / 2^19) x (D of
# d12 / D). A settings file knows no depth, so these lines are of a d20. For another, with --depth:
#
#         N           batch      steps    rates x    decay
#   d12   110.1 M       524,288  2,520    1          0.28
#   d20   435.2 M     1,048,576  4,980    1.414      0.1002
#   d24   729.8 M     1,048,576  8,352    1.414      0.0597
#
# What it has and our settings cannot say: Muon's momentum up to 0.97 in 400 steps, and down to 0.90 while the rates
# fall (ours: 0.95 in 300, and stays); a decay of embedding and head, 0.001 and 0.01, and beta2 of 0.995 and 0.96 for
# them (ours: none, 0.95); value embeddings and weighted residuals with rates of their own; windows of a quarter of the
# context in three of four layers (ours: half; here all is full context); fp8 matmuls, which its speedrun takes.

# Model
depth = 20  # its default
# Horizon
target_param_data_ratio = 12  # its default
ratio_counts = "matmuls"  # what it counts: blocks and head, not what is looked up
# Batch
total_batch_size = 1048576  # 2^20, as 2^19 x 3.95^0.383 = 2^19.76
# Optimizers: its defaults x sqrt(2^20 / 2^19); in both, those of embedding and head scale with (width / 768)^-0.5 too
matrix_lr = 0.02 * 1.414
embedding_lr = 0.3 * 1.414
unembedding_lr = 0.008 * 1.414
weight_decay = 0.28 * 1.414 * 110.1 / 435.2  # in both cautious, of Muon's matrices, to 0 along half a cosine
warmup_ratio = 40 / 4980  # it takes 40 steps, whatever the horizon
warmdown_ratio = 0.65  # its default, a line as ours
final_lr_frac = 0.05  # its default
