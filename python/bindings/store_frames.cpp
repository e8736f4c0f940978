#include "kvpo/store_frames.h"

#include <pybind11/pybind11.h>

#include "dlpack.h"
#include "pool.h"

namespace py = pybind11;

void bind_store_frames(py::module_& m) {
  m.def(
      "store_frames",
      [](const py::capsule& frames, const py::capsule& pool, const py::capsule& scales,
         const py::capsule& slots, int threads) {
        using namespace kvpo::dlpack;
        const View x(frames, "frames"), pages(pool, "pool"), table(slots, "slots");
        KVPO_CHECK(x.rank() == 4 && pages.rank() == 4 && x.device() == kCpu, "wrong rank");
        kvpo::StoreFrames a{};
        a.count = x.size(0);
        a.tokens = x.size(1);
        a.heads = x.size(2);
        a.head_size = x.size(3);
        a.threads = threads < 1 ? 1 : threads;
        a.dtype = kvpo::float_of(x, "frames");
        a.frames = x.contiguous().data();
        pages.expect({pages.size(0), a.tokens, a.heads, a.head_size});
        a.page = kvpo::page_of(pages);
        KVPO_CHECK(a.page != kvpo::Page::kAsQueries, "`pool` must be int8 or bits of float8");
        KVPO_CHECK(pages.stride(3) == 1 || pages.size(3) <= 1, "`pool`: strided last axis");
        a.pool = pages.data();
        a.pool_slot = pages.stride(0);
        a.pool_token = pages.stride(1);
        a.pool_head = pages.stride(2);
        a.scales = View(scales, "scales")
                       .contiguous()
                       .expect({pages.size(0), a.heads})
                       .data<float>(kFloat);
        a.slots = table.contiguous().expect({a.count}).data<int64_t>(kInt);
        kvpo::check_slots(a.slots, a.count, pages.size(0));
        py::gil_scoped_release unlocked;
        kvpo::cpu::store_frames(a);
      },
      py::kw_only(), py::arg("frames"), py::arg("pool"), py::arg("scales"), py::arg("slots"),
      py::arg("threads"));
}
