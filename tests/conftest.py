"""What all tests share."""

import torch

# Tests run beside each other on few cores, and their matrices are too small to gain from more threads.
torch.set_num_threads(1)
