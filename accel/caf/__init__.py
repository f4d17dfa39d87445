"""Constant Acceleration Flow (Park et al., NeurIPS 2024, arXiv:2411.00322): few-step sampling along
curves of constant acceleration.
"""
