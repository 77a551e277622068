"""What recipes are made of: options with their meaning. Importing a part imports no torch, `transformer`
excepted.
"""
