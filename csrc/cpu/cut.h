// How a convolution is cut into independent jobs: a grid over its matrix product.
//
// Rows of the product are output pixels (direct) or tiles (Winograd), panels are kPanel output
// channels of one group. Panels run fastest: neighbouring jobs read the same rows.
#pragma once

#include <algorithm>
#include <cstdint>

namespace resnet_fused {

struct Cut {
  int64_t groups = 0, rows = 0, panels = 0;  // of the convolution; panels of one group
  int64_t job_rows = 1, job_panels = 1;      // of a job; the last of a row or column may have fewer
  int64_t slice = 0;    // what a kernel takes of the reduction at once; direct: segments
  int64_t scratch = 0;  // floats of scratch memory that a job needs

  int64_t row_jobs() const { return ceil_div(rows, job_rows); }
  int64_t panel_jobs() const { return ceil_div(panels, job_panels); }
  int64_t count() const { return groups * row_jobs() * panel_jobs(); }

  // Halves the panels of a job until there are so many jobs, or one panel in each.
  void split_panels(int64_t wanted) {
    while (count() < wanted && job_panels > 1) job_panels = ceil_div(job_panels, 2);
  }
};

// Jobs that let all threads end together, though another process may slow one of them down.
inline int64_t jobs_wanted(int64_t threads) { return threads > 1 ? 8 * threads : 1; }

// The part of the product that one job computes.
struct JobRange {
  int64_t group;
  int64_t row_begin, row_end;
  int64_t panel_begin, panel_end;
};

inline JobRange job_range(const Cut& cut, int64_t index) {
  const int64_t panel_jobs = cut.panel_jobs(), row_jobs = cut.row_jobs();
  const int64_t block = index / panel_jobs;
  JobRange range;
  range.group = block / row_jobs;
  range.row_begin = block % row_jobs * cut.job_rows;
  range.row_end = std::min(range.row_begin + cut.job_rows, cut.rows);
  range.panel_begin = index % panel_jobs * cut.job_panels;
  range.panel_end = std::min(range.panel_begin + cut.job_panels, cut.panels);
  return range;
}

// Whether two jobs have the same rows of the same group; `previous` may be -1, none.
inline bool same_rows(const Cut& cut, int64_t index, int64_t previous) {
  return previous >= 0 && previous / cut.panel_jobs() == index / cut.panel_jobs();
}

}  // namespace resnet_fused
