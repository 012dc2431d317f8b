"""Machinery that methods and the pretrain verb share; knows no method."""
