"""What one end keeps on its disk: few values that survive a power cut, a journal of finished work, a lock; and their damage."""
