"""The commands that README.md and examples/ show: do they exist, and do they work?"""
