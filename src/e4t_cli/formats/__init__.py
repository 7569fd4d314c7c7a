"""Files that concepts are saved to and exported as."""
