"""The commands that README.md, docs/ and examples/ show: do they exist, and do they work?"""
