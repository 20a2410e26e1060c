"""The names that OpenRLHF imports from flash-attn, which installs on a CUDA machine alone. Nothing
that tests/integrations runs calls them.
"""
