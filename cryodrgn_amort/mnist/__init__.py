"""Appendix B of Edelberg & Lederman: the same questions, the same code, on pictures of digits."""
