"""Files of text to documents: which files a path names, and a reader for each kind of file."""

from moejax.data.formats.file_search import files_of_path
from moejax.data.formats.readers import READABLE, TEXT_FILES, Layout, read_documents, suffix_of

__all__ = ['READABLE', 'TEXT_FILES', 'Layout', 'files_of_path', 'read_documents', 'suffix_of']
