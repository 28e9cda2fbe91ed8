"""Files and folders that are there whole or not at all, and what they hold, checked."""

from pairclip._files.contents import (
    NewerFormatError,
    check_format,
    check_is_file,
    check_seal,
    checksum,
    checksum_of_fields,
    plain,
    read_json,
    sealed,
)
from pairclip._files.tensors import MappedTensors, bytes_of, write_header, write_tensors
from pairclip._files.whole import (
    flush,
    locked,
    put_aside,
    remove_folder,
    remove_leftovers,
    restore_replaced,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)

__all__ = [
    "MappedTensors",
    "NewerFormatError",
    "bytes_of",
    "check_format",
    "check_is_file",
    "check_seal",
    "checksum",
    "checksum_of_fields",
    "flush",
    "locked",
    "plain",
    "put_aside",
    "read_json",
    "remove_folder",
    "remove_leftovers",
    "restore_replaced",
    "sealed",
    "whole_file",
    "whole_folder",
    "write_header",
    "write_json",
    "write_tensors",
    "write_text",
]
