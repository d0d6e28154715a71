# RL of the laptop's model on problems of three and four steps: python -m scripts.chat_rl dev/configs/laptop_rl.py

task = "Arithmetic-Hard"
minutes = 1.5  # about 45 steps
examples_per_step = 16
num_samples = 8  # with 16, half as many steps fit into the time: 61 % instead of 65 % on held-out problems
max_new_tokens = 112  # the longest right answer has 90
device_batch_size = 32
init_lr_frac = 0.15
eval_every = -1
eval_examples = 100
eval_samples = 4
save_every = -1
