# SFT of the laptop's model: python -m scripts.chat_sft dev/configs/laptop_sft.py

mixture = "offline"
minutes = 2.75  # about 800 steps at 20,000 tokens/s
device_batch_size = 16
total_batch_size = 4096
init_lr_frac = 0.5
eval_every = 300
