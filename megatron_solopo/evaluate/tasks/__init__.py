"""RULER-style tasks (Hsieh et al. 2024, arXiv 2404.06654), made on the spot at exact lengths.

The kinds are RULER's, the wording and the word lists are our own: scores rank models and lengths, and are not RULER's.
"""
