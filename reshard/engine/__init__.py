"""Carries out a plan: reads, gathers and hands on bytes, in bounded memory.

Knows nothing about models, tables or what the bytes mean.
"""
