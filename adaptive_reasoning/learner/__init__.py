"""Learner: token log-probs, packing, the optimiser step, ZeRO-3 and checkpoints."""
