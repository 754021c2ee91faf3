"""Opening pictures and videos that nobody vouches for, in processes that can be killed."""
