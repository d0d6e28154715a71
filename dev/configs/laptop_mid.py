# Midtraining of the laptop's model: python -m scripts.mid_train dev/configs/laptop_mid.py

mixture = "offline"
minutes = 3.6  # about 1,050 steps at 20,000 tokens/s
device_batch_size = 16
total_batch_size = 4096
warmdown_ratio = 0.3
final_lr_frac = 0.3  # SFT goes on from there
eval_every = 300
