"""crc32 as zlib computes it, with the processor's own instructions."""

# zlib-ng gives the same values: 236 bytes take a third of the time, 12.8 kB a tenth, 100 kB a thirteenth.
try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    # There is no build of it for this processor or system.
    from zlib import crc32

__all__ = ["crc32"]
