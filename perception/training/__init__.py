"""Training of any network that offers `needs`, `encode`, `forward`, `encode_targets` and `loss`.

data set or city -> workers: augment, pack -> a thread: encode, encode_targets -> forward, loss, step -> weights
     data.py        augment.py                   prefetch.py                       loop.py, optimiser.py   checkpoint.py
"""
