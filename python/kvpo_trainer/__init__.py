"""The reference KVPO trainer: a streaming autoregressive video generator at CPU scale."""
