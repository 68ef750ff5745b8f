"""Generated from protos/cutaway/v1 by `make protos`."""
