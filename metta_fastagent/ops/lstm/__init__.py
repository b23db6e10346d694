"""The LSTM with resets inside a segment: one layer, its kernels, and all layers of an `nn.LSTM`."""
