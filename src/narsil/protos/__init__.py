"""Protobuf message modules, generated from proto/ when the package is built.

The server's hot path does not use them: its codecs read and write the wire by hand. They serve clients, server
reflection and the tests, which hold the hand-written codecs against them.
"""
