"""Reading and writing files wherever they lie: local disks, object stores, web servers."""
